"""The authenticated connection between leader and follower: addresses, secret, certificates, TLS, frames."""
