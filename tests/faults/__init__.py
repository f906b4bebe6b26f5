"""Faults for real: processes killed, disks full, bits flipped, files cut off, input that nobody expected."""
