"""The tasks that models are trained for, one file each; see :mod:`zoo.engine.task`."""
