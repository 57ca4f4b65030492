"""The experiment: training to the end, folders of runs, folds by subject, from image to mask, pictures, reports."""
