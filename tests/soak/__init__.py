"""Many editors on one daemon for a long time, and every fault that can be caused from outside."""
