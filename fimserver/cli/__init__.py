"""The ``fimserver`` command: one module for each group of commands.

Knows:  options, the terminal.  Never: how the work behind a command is done.
"""
