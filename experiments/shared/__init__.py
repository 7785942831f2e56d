"""What the commands share: settings, flags, the loop."""
