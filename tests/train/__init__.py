"""Tests of training a whole model."""
