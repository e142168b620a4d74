"""What ``python -m zoo.tools.benchmark`` measures, one file a subject.

A subject is a module with two functions: ``add_arguments(parser)`` declares its own options, and
``run(machine, options)`` measures, prints its tables and returns what goes into the JSON file. ``ops`` is made of
sections, one file an op.
"""
