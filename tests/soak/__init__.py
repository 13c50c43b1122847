"""Many editors at one daemon for a long time, and every fault that can be made from outside."""
