"""What one transaction can do: each module holds the actions on one subject, `action.py` performs them all or none.

The single commands of the monitor perform the same actions.
"""
