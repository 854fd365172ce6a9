"""A report from results files: one page with the answer, the charts, the tables and the way to run it again."""
