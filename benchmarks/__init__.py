"""What the library costs beside the same work done plainly: ``python -m benchmarks`` (``make bench``)."""
