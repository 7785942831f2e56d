"""Code shared by the commands: settings, flags, the training loop."""
