"""The log behind one URL: `open_log`."""
