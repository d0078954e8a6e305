"""What a compressed tensor is: number formats, packing, and the bytes on disk."""
