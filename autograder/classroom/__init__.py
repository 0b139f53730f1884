"""Grades a class: finds submissions, grades each in isolation, resumes, writes the reports."""
