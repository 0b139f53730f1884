"""Makes what leaves the authors' repository: the students' course, and Gradescope's archive."""
