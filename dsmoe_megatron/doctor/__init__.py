"""The verb `doctor`: what is here, what a recipe would use of it, and what to install for more."""
