"""One file per device.  A kernel says why it cannot take a call; the reference takes whatever is left."""
