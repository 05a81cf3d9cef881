"""torch's process groups and their store, over the connection of leader and follower."""
