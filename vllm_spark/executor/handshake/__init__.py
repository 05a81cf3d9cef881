"""The handshake between leader and follower: connections, versions, the model's files."""
