"""One file per family of golden cases, named as the family's folder, with ``run(case)``."""
