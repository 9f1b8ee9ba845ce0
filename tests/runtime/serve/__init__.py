"""Tests of runtime/serve."""
