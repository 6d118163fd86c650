#include "serving/wire/session.h"
#include <gtest/gtest.h>
