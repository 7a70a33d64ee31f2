"""What a report needs beyond main and compare."""
