// Numbers as people read them.

const counts = new Intl.NumberFormat("en");

/** 1234567 as "1,234,567". */
export const count = (number) => counts.format(number);

/** Bytes as "19.93 GiB", with three digits that matter. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; number >= 1000 && unit < units.length - 1; unit += 1) number /= 1024;
  return `${unit === 0 ? number : digits(number)} ${units[unit]}`;
}

/** Seconds as "12 ms", "1.24 s", "3 min 5 s" or "2 h 10 min". */
export function seconds(number) {
  if (number < 0.9995) return `${Math.round(number * 1000)} ms`;
  if (number < 60) return `${digits(number)} s`;
  const whole = Math.round(number);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** A rate as "84.2", with three digits that matter. */
export const rate = (number) => digits(number);

function digits(number) {
  if (number === 0) return "0";
  if (number >= 99.95) return count(Math.round(number));
  return number.toFixed(number >= 9.995 ? 1 : 2);
}
