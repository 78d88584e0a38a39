"""The ``mycel`` command: what an operator sees and starts.

Owns argument parsing, presentation and exit statuses. It may import every other package and none imports it; whatever
more than one command needs lives in the package that owns the subject.
"""
