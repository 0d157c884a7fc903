"""The parts of `benchmarks/gpu.py`: each measures or checks in a process of its own and writes a line a case."""
