"""Objects, their masks and their keypoints: boxes, anchors, assignment, losses, suppression."""
