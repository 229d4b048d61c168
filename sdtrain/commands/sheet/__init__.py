"""`sdtrain view`: a contact sheet of what a model will see."""
