"""The worked tasks: digits comes with scikit-learn, the others read their files under FEDMQ_DATA."""
