"""Tests of runtime/gateway."""
