"""Knowledge, made testable: which facts a model can take from a prefix, which attention edges carry an answer."""
