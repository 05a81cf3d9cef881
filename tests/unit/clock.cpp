// Another wall clock for one process: preloaded, it adds CLOCK_OFFSET_SECONDS to what the machine's says.
#include <dlfcn.h>
#include <sys/time.h>

#include <cstdlib>
#include <ctime>

namespace {

long long offset() {
  static const long long seconds = std::atoll(std::getenv("CLOCK_OFFSET_SECONDS"));
  return seconds;
}

template <typename Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec* now) {
  static const auto original = real<int (*)(clockid_t, timespec*)>("clock_gettime");
  const int result = original(clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
  return result;
}

extern "C" time_t time(time_t* place) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (place != nullptr) *place = now.tv_sec;
  return now.tv_sec;
}

extern "C" int gettimeofday(timeval* now, void*) {
  timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}
