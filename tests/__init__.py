"""Tests, in folders like the code's, and what several of them share."""
