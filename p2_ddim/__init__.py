"""Problem 2: DDIM sampling of faces, with the course's network or a small one that comes with the repository."""
