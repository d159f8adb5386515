"""What people look at: tables and contact sheets."""
