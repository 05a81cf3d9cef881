"""Tests of RDMA on real queue pairs: two virtual machines with soft-RoCE. See docs/testing.md."""
