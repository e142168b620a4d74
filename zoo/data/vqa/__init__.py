"""Published benchmarks of visual question answering, read from the files that their authors publish.

benchmark = open_benchmark("gqa", "/data/gqa", "testdev_balanced")
for sample in benchmark.samples:
    print(sample.question, sample.answers, benchmark.image(sample))
"""

from zoo.data.vqa import fashion_scenes, gqa, pope, scienceqa, textvqa, vqav2  # registers them
from zoo.data.vqa.benchmark import Benchmark, Sample, list_benchmarks, open_benchmark, register_benchmark

__all__ = [
    "Benchmark",
    "Sample",
    "fashion_scenes",
    "gqa",
    "list_benchmarks",
    "open_benchmark",
    "pope",
    "register_benchmark",
    "scienceqa",
    "textvqa",
    "vqav2",
]
