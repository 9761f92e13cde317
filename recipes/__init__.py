"""What the recipes share with no other room: how each builds its examples."""
