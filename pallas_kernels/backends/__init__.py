"""What the kernels of one compiler share. Only the kernel files of operations import from here."""
