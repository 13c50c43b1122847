"""Define the ``fimserver`` command: one module for each group of commands.

Knows:  options, the terminal.  Never: how the work of a command is done.
"""
