"""What a person or another program touches: the daemons, their configuration, the command `hci`."""
