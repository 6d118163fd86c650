#include "serving/wire/grpc_headers.h"
#include <gtest/gtest.h>
