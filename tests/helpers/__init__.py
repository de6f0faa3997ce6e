"""What several tests share: forked worlds, commands, runs of the tiny model and their references, small models."""
