"""How leader and follower find each other and agree, before the first call."""
