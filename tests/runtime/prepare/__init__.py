"""Tests of runtime/prepare."""
