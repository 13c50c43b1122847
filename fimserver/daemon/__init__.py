"""The daemon that serves all editors, and the relay that connects one editor to it.

The relay imports the standard library only: an editor starts one for each window.
"""
