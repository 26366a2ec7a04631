"""What each engine knows of a container: its id, bundle, runtime root, image and root filesystem."""
