"""What the library costs in time and bytes, each way beside its control, as ratios from one run."""
