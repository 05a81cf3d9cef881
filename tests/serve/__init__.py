"""Tests of the whole product: real servers, two hosts, an official client. See docs/testing.md."""
