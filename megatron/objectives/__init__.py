"""Objectives: the forward process of each in one file, in training and in evaluation, and the options they share."""
