"""What the tests add to modelcli from outside."""
